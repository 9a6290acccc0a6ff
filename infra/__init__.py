"""What diffstill stands on: a stack for one machine, manifests for a cluster, dashboards and alerts."""
