"""The commands of ``qvlm``, each in a module of its name. They import slow packages only when they run."""
