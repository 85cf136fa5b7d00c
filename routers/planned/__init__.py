"""The plan: which steps are computed, and the policy that follows it."""
