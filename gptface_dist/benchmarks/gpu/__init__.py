"""``gptface bench gpu``: correctness and speed of everything that needs a GPU, in one command and in minutes.

``plan`` lists the parts, each a file of ``parts/``; ``driver`` runs every part in processes of its own (``worker``) under a
time limit; a part writes what it finds through its ``context`` into a file of records (``records``) as it goes; ``verdict``
decides the exit status, ``table`` shows the records.
"""
