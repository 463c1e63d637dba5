"Running experiments, publishing their results, and the command line"
