"""From istio-cni to Sluice on one node, and back: what is there, what differs, and the steps."""
