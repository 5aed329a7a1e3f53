"""`python -m mpctf_secure` is the console script."""

from mpctf_secure.cli.app import main

main()
