//! Ways from the host to a guest's agent: bytes in order, both ways, for one
//! client at a time and connection.
//!
//! Does not know what the bytes mean; that is `agent`.

pub mod frame;
#[cfg(feature = "host")]
pub mod serial;
