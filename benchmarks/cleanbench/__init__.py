"""CleanBench: damage with known truth on procedural scenes and real clips; ours beside the tools that people use today."""
