"""The parts of ``gptface bench gpu``: a file each, with one function ``run(context)``."""
