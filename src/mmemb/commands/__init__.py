"""The commands of `mmemb` beside training, one file each; every module has ``main(argv) -> int``."""
