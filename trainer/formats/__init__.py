"""The files other tools keep coders in: one module a format, each with what it can hold and what it cannot.

A module has `MARK`, the file by which its folders are known, and `read(folder, ...)`; those of formats we also write
have `write(coder, folder, ...)`, which refuses (UserError) a coder that the format cannot hold as it is.
"""
