"""Stand-in."""


class MoE:
    pass
