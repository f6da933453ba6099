"""What a person submits: `python -m jobs.X`, or through `ray job submit --runtime-env jobs/runtime_env.yaml`."""
