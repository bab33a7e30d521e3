"""SeqIO tasks of clp_jax, installed as `clp_jax.tasks`; importing a module registers its tasks."""
