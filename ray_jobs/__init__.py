"""Ray jobs: resources, actors, retries and progress; the only package that imports Ray. No tensors, no maths."""
