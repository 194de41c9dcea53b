"""``make eval-methods``: train what ``surgery add`` wrote, on a real base and a real task, and publish what comes out.

``task`` reads the sentences, ``candidates`` is the table of methods, ``training`` the one loop, ``study`` decides what is
run, and ``page`` writes it down. It runs in the environment of AdapterHub's ``adapters``, which pins a transformers of its
own: nothing of surgery is imported, its command line is run.
"""
