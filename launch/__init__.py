"""Turns a command into a job elsewhere (TPU VMs, GKE, SLURM, XManager, local processes); imports nothing of clp_jax."""
