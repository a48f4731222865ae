"""The commands of `mmemb`, including those of the trainer. Each module has ``main(argv) -> int``."""
