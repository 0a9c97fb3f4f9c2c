//! The cache factory: a pool of VMs that are ready.
//!
//! ```text
//!            jobs (rendezvous)              ready channel        claims' handlers
//! driver ───────────────► boot workers      ──────────────►      take one at once
//!   ▲  ◄─────────────────── events ◄──────────────────────────── or wait in line
//!   └── one thread, one select!             ◄── watch: pidfds of QEMUs and owners
//! ```
//!
//! Files: [`driver`] the loop, [`policy`] its decisions (pure), [`claim`] a
//! place in the `line`, [`pool`] what handlers and driver share, [`watch`] the
//! pidfds, [`making`] the boot workers, [`resting`] what is done for VMs that
//! wait, [`board`] what status shows, [`measures`] how long things take.
//!
//! Invariants: a ready VM is in exactly one place: the ready channel, a claim's
//! place, or a handler's hands. Claims of one user are served in the order in
//! which they came, users in turn. The pool never closes because of a failed boot.

pub mod board;
pub mod claim;
pub mod driver;
mod line;
pub mod making;
pub mod measures;
pub mod policy;
pub mod pool;
pub mod quota;
pub mod resting;
mod room;
pub mod watch;
