"""What a person submits: `python -m jobs.X`, or `ray job submit --runtime-env jobs/runtime_env.yaml -- python -m jobs.X`."""
