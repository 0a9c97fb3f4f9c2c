//! The integration tests, one binary. Everything here is real: QEMU, a
//! distribution's kernel, the guest agent, gRPC on a Unix socket.
//!
//! | module      | shows |
//! |-------------|-------|
//! | `pool`      | life of a pool: fill, claim, order, replace, stop, restart |
//! | `wire`      | the four calls and their JSON, as Kata's clients see them |
//! | `run`       | commands: streams, exit codes, signals, terminal, users, sizes |
//! | `streams`   | standard streams of all kinds, cell by cell; loops and jobs of a shell |
//! | `signals`   | signals, `kill`, starts that fail, limits of time |
//! | `printing`  | every command with an output that takes nothing |
//! | `users`     | users, environment, the guest's memory; the agent alone |
//! | `archives`  | tars by all programs, unpacked as GNU tar unpacks them |
//! | `rootfs`    | a Debian root as a directory and as a tar |
//! | `share`     | a root file system by virtio-fs; what serves a VM goes with it |
//! | `attach`    | disks and network cards at claim time, and what is wrong with them |
//! | `claimed`   | exec, cp, ps, stats, pause, resume, list, stop |
//! | `copies`    | cp by docker cp's rules both ways, tar streams, what does not fit, whose error |
//! | `guest`     | every agent call; four clients at once; a client that dies |
//! | `conformance` | one walk through all that agents can do |
//! | `transports` | our agent walks it, over each transport |
//! | `kata1`     | agents of Kata 1.x, scripted: gRPC, yamux, the proxy process |
//! | `doubles`   | doubles of Kata's agents in real guests: streams, codes, signals |
//! | `interop`   | stock agents, clients and servers, for who has them (`tests/interop/run`) |
//! | `doctor`    | what a host lacks; what a server counts, as OpenMetrics |
//! | `messages`  | what a server tells syslog, in both forms, and how much |
//! | `faults`    | what can be wrong, each with its error and exit code |
//! | `deaths`    | SIGKILL of clients and of VMs |
//! | `restart`   | servers that are killed or restarted, and what becomes of their VMs |
//! | `supervised` | servers under a supervisor, in systemd's protocol |
//! | `states`    | servers that are killed in each of their states |
//! | `control`   | claims that are confirmed, VMs given back, pools drained and resized |
//! | `hostile`   | noise on the socket, and users who want all of it |
//! | `confinement` | what QEMU can not do, and who may have a VM |
//! | `memory`    | hosts that run out of it |
//! | `devices`   | which devices a running VM has, and no others |
//! | `resting`   | VMs in the pool: rehearsed, paused, and claimable before that |
//! | `resize`    | CPUs and memory added, in direct VMs and clones, q35 and pc |
//! | `templates` | clones: unique, and their template made anew when it breaks |
//! | `template_place` | its mount, its room, its creation cut short |
//! | `vsock`     | kernel vsock, in a VM of a kernel that has it (`tests/nested`) |
//! | `readme`    | the README's table of options is the code's |
//!
//! `tests/run` prepares what they need and names it in `VMCACHE_TEST_DIR`;
//! without that they fail when `VMCACHE_REQUIRE_QEMU` is set, and say loudly
//! that they were skipped when it is not.

// Tests start processes and threads, and print what they find.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros)]

mod archives;
mod attach;
mod claimed;
mod confinement;
mod conformance;
mod control;
mod copies;
mod daemon;
mod deaths;
mod devices;
mod doctor;
mod doubles;
mod faults;
mod guest;
mod hostile;
mod interop;
mod kata1;
mod memory;
mod messages;
mod pool;
mod printing;
mod readme;
mod resize;
mod restart;
mod resting;
mod rootfs;
mod run;
mod share;
mod signals;
mod states;
mod streams;
mod supervised;
mod template_place;
mod templates;
mod transports;
mod users;
mod vsock;
mod wire;
