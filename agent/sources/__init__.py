"""Where facts about pods come from: CNI calls, Kubernetes, static files, pods that are already up."""
