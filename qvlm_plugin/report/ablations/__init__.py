"""The paper's ablations (section 4.2): Table 1 and Figures 2 and 3, each as one report.

Table 1 and Figures 3a and 3b rest on real evaluations, one harness run for each configuration. Figures 2 and 3c are
measured inside the model: the numbers in `difference` and `layer_errors`, their reports in `figure2` and `figure3c`.
"""
