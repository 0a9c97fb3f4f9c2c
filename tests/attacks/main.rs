//! Attackers, each in the place that it would really have, and what stops it. Each program of
//! an attacker also runs with its wall taken down (`vmcache::walls`), and must then succeed:
//! else its being refused would show nothing.
//!
//! | module     | the attacker |
//! |------------|--------------|
//! | `claimer`  | a user who has a VM of its own, its QEMU's monitor included |
//! | `guest`    | a guest: its files, its agent's answers, its console |
//! | `paths`    | who owns a configured path, or a directory above it |
//! | `qemu`     | a QEMU that a guest has taken over: a program in its place |
//! | `stranger` | a user who may connect, but not claim |
//!
//! The fixture of servers is the integration tests'.

// Tests start processes and threads, and print what they find.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros)]

#[path = "../integration/daemon.rs"]
#[allow(dead_code)]
mod daemon;

mod claimer;
mod guest;
mod paths;
mod qemu;
mod stranger;
