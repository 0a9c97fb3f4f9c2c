//! vmcache
#[cfg(feature = "guest")]
pub mod guest;
#[allow(missing_docs)]
pub mod proto;
pub mod sys;
pub mod transport;
