"""Manifests for Kubernetes: templates in YAML, and the code that fills them in."""
