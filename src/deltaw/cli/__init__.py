"""The command line: one file per noun, commands of a few lines over the library."""
