"""What Kubernetes' API server says of this node's pods, and what is written there."""
