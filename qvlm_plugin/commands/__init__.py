"""Commands of ``qvlm`` that have a module of their own."""
