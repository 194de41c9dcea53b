"""Operations: one verb a file. Each plans over headers and returns a lazy result, or a report; the command line and
the Python API call the same function.
"""
