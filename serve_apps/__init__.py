"""The deployment graph: an edge ingress that calls a cloud deployment for complex samples only."""
