//! Challenges, instances, pools: the use cases and the ports they need.
