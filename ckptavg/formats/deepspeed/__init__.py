"""DeepSpeed checkpoints: directories with the states of each rank."""
