#!/usr/bin/env -S python3 -SE
"""A fake of `ssh-add -l` and `ssh-keygen -lf`: what an agent holds, and what key there is.

Troubles: ``agent`` (does not run, or holds another key), ``key`` (there is none).
"""

import sys
from pathlib import Path

from state import fail, log_call, trouble

tool = Path(sys.argv[0]).name
log_call(tool)
if tool == "ssh-keygen":
    if trouble("key"):
        fail(f"{sys.argv[2]} is not a public key file.", 255)
    print("3072 SHA256:abc someone (RSA)")
else:
    found = trouble("agent")
    if found == "absent":
        fail("Could not open a connection to your authentication agent.", 2)
    print("256 SHA256:other someone (ED25519)" if found else "3072 SHA256:abc someone (RSA)")
