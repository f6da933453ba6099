"""What `benchmarks.serving` compares with: the same networks behind other servers, each as its makers document it."""
