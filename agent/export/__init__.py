"""What the agent shows: metrics, health and the admin API, over TCP and a unix socket."""
