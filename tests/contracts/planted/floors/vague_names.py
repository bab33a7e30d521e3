# at: clp_jax/nn/utils.py
# at: clp_jax/common/losses.py
# at: tasks/helpers.py
# at: clp_jax/stuff.py
# wrong: clp_jax/nn/utils.py: 'utils' says nothing about what is inside
# wrong: clp_jax/common/losses.py: 'common' says nothing about what is inside
# wrong: clp_jax/common/losses.py: is on no floor
# wrong: tasks/helpers.py: 'helpers' says nothing about what is inside
# wrong: clp_jax/stuff.py: is on no floor
