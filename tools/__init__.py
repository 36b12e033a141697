"""The commands of the ``gptface`` program: they parse, call and print, and hold no logic of their own."""
