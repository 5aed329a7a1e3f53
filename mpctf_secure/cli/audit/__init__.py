"""`mpctf-secure audit`: one module for each kind of work on logs."""
