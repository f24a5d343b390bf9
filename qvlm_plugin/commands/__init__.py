"""The commands of ``qvlm``, each in a module of its name. What needs torch they import themselves."""
