"""The paper's ablations (section 4.2): Table 1 and Figures 2 and 3, each as one report.

Table 1 and Figures 3a and 3b come from evaluations, one run of the harness for each configuration. Figures 2 and 3c
are measured inside the model: `difference` and `layer_errors` compute them, `figure2` and `figure3c` report them.
"""
