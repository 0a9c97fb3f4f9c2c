//! `vmcache bench --relay-uid UID`: what the relay in front of gRPC costs, beside connections
//! that do not pass it, in turn, of one server.
//!
//! *Direct* is root's connection; *relayed* one that another user made, who must be among those
//! who may claim: others may not make calls as fast as they can. Each call is made on both, now
//! on the one first, now on the other. A fresh connection is measured from connect(2) to its
//! first answer; gRPC's thread in the client stands ready before that.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::Environment;
use serde_json::json;

use super::samples::{bound, Samples};
use super::{wait_full, FULL};
use crate::cli::args::{Bench, Common};
use crate::cli::output::{Failure, FAILED};
use crate::cli::print::{self, Printed};
use crate::cli::progress::Progress;
use crate::cli::{connect, endpoint};
use crate::factory::grpccache::{self, GrpcCache};
use crate::sys::rpc::connect_as;
use crate::worker::Worker;

/// Longest that one connection may take.
const LONG: Duration = Duration::from_secs(30);
/// Most that a relayed call on a connection in use may take, of a direct one: p50 over p50.
const REUSED: f64 = 1.5;
/// The same of a fresh connection with its first call.
const FRESH: f64 = 1.3;

/// A measure of both.
#[derive(Default)]
struct Pair {
    direct: Samples,
    relayed: Samples,
}

impl Pair {
    fn ratio(&self) -> Option<f64> {
        let p50 = |s: &Samples| s.quantile(0.5).map(|d| d.as_secs_f64());
        Some(p50(&self.relayed)? / p50(&self.direct).filter(|d| *d > 0.0)?)
    }
}

/// Where to connect, and as whom.
#[derive(Clone)]
struct Peer {
    socket: Arc<Path>,
    uid: u32,
    environment: Arc<Environment>,
}

impl Peer {
    /// On a thread of its own, which is that user from then on: a connection, and how long it
    /// took from connect(2) until its first answer.
    fn connect(&self) -> Result<(GrpcCache, Duration), Failure> {
        let Peer { socket, uid, environment } = self.clone();
        let made = Worker::spawn("vmc-connect", move || -> Result<_, Failure> {
            let start = Instant::now();
            let stream = connect_as(&socket, uid, uid).map_err(|e| {
                let text = format!("connect to {} as uid {uid}: {e}", socket.display());
                Failure::new(FAILED, text)
            })?;
            let client = GrpcCache::over(stream, &socket, environment)?;
            client.fetch_config_raw()?;
            Ok((client, start.elapsed()))
        });
        let failed = |e: crate::worker::Error| Failure::new(FAILED, e.to_string());
        made.map_err(failed)?.join(LONG).map_err(failed)?
    }
}

/// Measures and prints.
pub fn bench(common: &Common, b: &Bench, uid: u32) -> Result<u8, Failure> {
    let own = nix::unistd::geteuid().as_raw();
    if own != 0 || uid == 0 {
        let text = "--relay-uid is for root, with another user's number: root's own connections \
                    do not pass the relay";
        return Err(Failure::new(crate::cli::output::USAGE, text));
    }
    let socket: Arc<Path> = endpoint(common)?.into();
    let environment = grpccache::environment();
    let peers = [own, uid].map(|uid| Peer {
        socket: Arc::clone(&socket),
        uid,
        environment: Arc::clone(&environment),
    });
    let progress = Progress::start("measuring calls, direct and relayed");
    let reused = reused(&peers, b.calls)?;
    drop(progress);
    let progress = Progress::start("measuring fresh connections, direct and relayed");
    let fresh = fresh(&peers, b.connects)?;
    drop(progress);
    let mut claimed = Pair::default();
    if b.claims > 0 {
        let _progress = Progress::start("measuring claims, direct and relayed");
        claimed = claims(&connect(common)?, &peers, b.claims)?;
    }
    report(b, &reused, &fresh, &claimed)?;
    Ok(0)
}

/// Whose turn is first changes, so that what a pause makes slow is shared evenly.
fn in_turn(
    n: usize,
    mut once: impl FnMut(usize) -> Result<Duration, Failure>,
) -> Result<Pair, Failure> {
    let mut pair = Pair::default();
    for at in 0..n {
        for which in if at % 2 == 0 { [0, 1] } else { [1, 0] } {
            let took = once(which)?;
            match which {
                0 => pair.direct.add(took),
                _ => pair.relayed.add(took),
            }
        }
    }
    Ok(pair)
}

fn reused(peers: &[Peer; 2], n: usize) -> Result<Pair, Failure> {
    let clients = [peers[0].connect()?.0, peers[1].connect()?.0];
    in_turn(n, |which| {
        let start = Instant::now();
        clients[which].fetch_config_raw()?;
        Ok(start.elapsed())
    })
}

fn fresh(peers: &[Peer; 2], n: usize) -> Result<Pair, Failure> {
    in_turn(n, |which| Ok(peers[which].connect()?.1))
}

/// Claims, each confirmed and given back.
fn claims(server: &GrpcCache, peers: &[Peer; 2], n: usize) -> Result<Pair, Failure> {
    let clients = [peers[0].connect()?.0, peers[1].connect()?.0];
    let mut ready = 0;
    in_turn(n, |which| {
        if ready == 0 {
            ready = wait_full(server)?["pool"]["ready"].as_u64().unwrap_or(1);
        }
        ready -= 1;
        let start = Instant::now();
        let (vm, _) = clients[which].claim(Some(FULL))?;
        let took = start.elapsed();
        clients[which].confirm_claim(&vm.id)?;
        clients[which].release(&vm.id)?;
        Ok(took)
    })
}

fn report(b: &Bench, reused: &Pair, fresh: &Pair, claimed: &Pair) -> Printed {
    let all = [
        ("Config", "config", reused),
        ("connect and Config", "fresh", fresh),
        ("Claim, VM ready", "claim", claimed),
    ];
    if b.json.json {
        let mut out = json!({});
        for (_, key, pair) in all {
            out[key] = json!({
                "direct": pair.direct.json(), "relayed": pair.relayed.json(),
                "ratio": pair.ratio(),
            });
        }
        return print::json(&out);
    }
    let heads = ["", "n", "p50", "p90", "p99", "max"];
    let mut rows = vec![heads.iter().map(|h| h.to_string()).collect::<Vec<_>>()];
    for (name, _, pair) in all.iter().filter(|(_, _, pair)| pair.direct.len() > 0) {
        rows.push(pair.direct.row(&format!("{name}, direct")));
        rows.push(pair.relayed.row(&format!("{name}, relayed")));
    }
    print::table(&rows)?;
    print::block("\n")?;
    bound("S9", "p50 of Config relayed / direct, connection in use", reused.ratio(), REUSED)?;
    bound("S9", "p50 of connect and Config relayed / direct", fresh.ratio(), FRESH)?;
    match claimed.ratio() {
        Some(ratio) => print::block(format!(
            "    p50 of Claim relayed / direct: {ratio:.3} (handing it over included)\n"
        )),
        None => Ok(()),
    }
}
