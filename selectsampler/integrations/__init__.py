"""Short adapters to training frameworks; each module imports its framework, and is imported only when used."""
