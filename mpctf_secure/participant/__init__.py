"""A participant's process: it dials out, checks what it is asked to do, trains and takes part."""
