//! Messages and stubs generated from `proto/` by build.rs. Nothing by hand.

include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
