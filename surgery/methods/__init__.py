"""PEFT methods, one file each: which parameters a method adds, how they start, how many they are, what file they become.

A method plans on headers alone: names, shapes and ``config.json`` (:class:`surgery.methods.model.Model`) in, an
:class:`surgery.methods.addition.Addition` out. torch is imported only when initial values are drawn
(:mod:`surgery.methods.starts`). No method opens or writes a file.
"""
