# at: clp_jax/data/records.py
import os
import pickle
import subprocess
from marshal import loads

eval("1")
exec("x = 1")
os.system("ls")
subprocess.run("ls", shell=True)
os.popen("ls")
subprocess.run(["ls"], shell=False)
# wrong: imports pickle: stored data must not run code
# wrong: imports marshal.loads: stored data must not run code
# wrong: calls eval: it runs what it reads
# wrong: calls exec: it runs what it reads
# wrong: calls os.system: it runs a shell
# wrong: calls subprocess.run with a shell
# wrong: calls os.popen: it runs a shell
