"""The files in which other tools keep coders: one module per format, which says what it can hold and what it cannot.

A module has `MARK`, the file that identifies its folders, and `read(folder, ...)`; modules of formats we also write
have `write(coder, folder, ...)`, which refuses (UserError) a coder that the format cannot hold as it is.
"""
