"""What a compiled program costs on a TPU slice: read from what the compiler says, without the slice."""
