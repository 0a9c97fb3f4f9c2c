//! `vmcache status`.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::args::{Check, Common, Status};
use super::metrics;
use super::output::{age, table, Failure, FAILED};
use super::progress::Progress;
use super::{connect, escape, print, Outcome};
use crate::factory::grpccache::{Error, GrpcCache};
use crate::sys::process::{pidfd_kill, pidfd_open, pidfd_wait};

/// Between two looks with `--watch`.
const EVERY: Duration = Duration::from_secs(1);
/// Between two looks whether something has been done.
const LOOK: Duration = Duration::from_millis(50);
/// SIGUSR1: end, and leave the VMs to the next server.
const LEAVE: i32 = 10;
/// How long a server may take to restart: what waits is ended, and its pool looked at.
const RESTART: Duration = Duration::from_secs(60);

/// Prints the status, once or again and again.
pub fn status(common: &Common, s: &Status) -> Outcome {
    if s.openmetrics {
        return openmetrics(common, s);
    }
    let server = connect(common)?;
    if let Some(what) = s.check {
        return check(&server.fetch_details()?, what);
    }
    loop {
        let shown = look(&server, s.json.json)?;
        if s.watch {
            print::clear_screen()?;
        }
        match &shown {
            Shown::Json(details) => print::json(details)?,
            Shown::Text(text) => print::block(text)?,
        }
        if !s.watch {
            return Ok(0);
        }
        pause(EVERY);
    }
}

/// Prints or writes the measures, once or again and again.
fn openmetrics(common: &Common, s: &Status) -> Outcome {
    let form = s.output.as_ref().map_or(metrics::Form::Open, |_| metrics::Form::Textfile);
    loop {
        // Connected anew each time: servers are restarted.
        let told = connect(common).and_then(|server| Ok(server.fetch_details()?));
        let text = match &told {
            Ok(status) => metrics::openmetrics(status, form),
            Err(_) => metrics::down(form),
        };
        match &s.output {
            None => print::block(text)?,
            Some(file) => metrics::write(file, &text)
                .map_err(|e| Failure::new(FAILED, format!("write {}: {e}", file.display())))?,
        }
        let Some(every) = s.every else { return told.map(|_| 0) };
        if let Err(e) = told {
            e.report();
        }
        pause(every);
    }
}

/// Whether a server is as who supervises it wants it.
fn check(status: &Value, what: Check) -> Outcome {
    let mut stuck = status["stuck"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let pool = &status["pool"];
    let why = match what {
        Check::Live => stuck.next().map(str::to_string),
        Check::Ready => (pool["ready"].as_u64() == Some(0)).then(|| {
            let held = pool["held"].as_str().or(status["last_error"].as_str());
            format!("no VM stands ready ({})", held.unwrap_or("the pool is being filled"))
        }),
    };
    match why {
        Some(why) => Err(Failure::new(FAILED, why)),
        None => Ok(0),
    }
}

/// Restarts the server and waits until it answers again.
pub fn restart(common: &Common) -> Outcome {
    let server = connect(common)?;
    let before = server.fetch_details()?["started"].clone();
    server.restart()?;
    drop(server);
    let _progress = Progress::start("waiting for the server");
    let deadline = Instant::now() + RESTART;
    loop {
        // The socket stays: this waits for who accepts next.
        match connect(common).and_then(|s| Ok(s.fetch_details()?)) {
            Ok(now) if now["started"] != before => return Ok(0),
            Err(e) if Instant::now() > deadline => return Err(e),
            Ok(_) if Instant::now() > deadline => {
                let text = "the server did not restart: its log tells why";
                return Err(Failure::new(FAILED, text));
            }
            _ => pause(LOOK),
        }
    }
}

/// Ends the server, which leaves its VMs to the next one, and waits until it has gone.
pub fn leave(common: &Common) -> Outcome {
    let server = connect(common)?;
    let failed = |why: String| Failure::new(FAILED, format!("end the server: {why}"));
    let pid = server.fetch_details()?["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.filter(|pid| *pid > 1).ok_or_else(|| failed("it tells no pid".into()))?;
    let pidfd = pidfd_open(pid).map_err(|e| failed(format!("pid {pid}: {e}")))?;
    // Still its own: it answered a moment ago, and would be waited for otherwise.
    pidfd_kill(pidfd.as_fd(), LEAVE).map_err(|e| failed(format!("signal pid {pid}: {e}")))?;
    let _progress = Progress::start("waiting for the server to end");
    match pidfd_wait(pidfd.as_fd(), RESTART) {
        true => Ok(0),
        false => Err(failed(format!("pid {pid} has not gone after {} s", RESTART.as_secs()))),
    }
}

/// Drains the pool and waits until nothing stands ready.
pub fn drain(common: &Common) -> Outcome {
    let server = connect(common)?;
    server.drain()?;
    let _progress = Progress::start("waiting for VMs to end");
    loop {
        let pool = &server.fetch_details()?["pool"];
        if pool["ready"] == 0 && pool["booting"] == 0 {
            return Ok(0);
        }
        pause(LOOK);
    }
}

#[allow(clippy::disallowed_methods)] // A picture a second, for a person.
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// What a look is printed as.
enum Shown {
    Json(Value),
    Text(String),
}

fn look(server: &GrpcCache, json: bool) -> Result<Shown, Failure> {
    let details = match server.fetch_details() {
        Ok(details) => details,
        // A stock Kata server: what its own Status tells.
        Err(Error::Unsupported { .. }) => plain(server)?,
        Err(e) => return Err(e.into()),
    };
    Ok(if json { Shown::Json(details) } else { Shown::Text(render(&details)) })
}

fn plain(server: &GrpcCache) -> Result<Value, Failure> {
    let status = server.fetch_status()?;
    let vms: Vec<Value> = status
        .vmstatus
        .iter()
        .map(|v| serde_json::json!({"pid": v.pid, "cpus": v.cpu, "memory_mib": v.memory, "state": "ready"}))
        .collect();
    Ok(serde_json::json!({
        "pid": status.pid,
        "endpoint": server.endpoint().display().to_string(),
        "pool": {"ready": vms.len()},
        "vms": vms,
    }))
}

fn render(v: &Value) -> String {
    let text = |v: &Value| match v {
        Value::Null => "-".to_string(),
        Value::String(s) => escape::line(s),
        other => other.to_string(),
    };
    let pool = &v["pool"];
    let mut out = format!(
        "server {} (pid {}) at {}\npool   {} ready of {}{}, {} booting, {} claims waiting\n",
        text(&v["version"]),
        text(&v["pid"]),
        text(&v["endpoint"]),
        text(&pool["ready"]),
        text(&pool["target"]),
        match pool["awake"].as_u64() {
            None | Some(0) => String::new(),
            Some(n) => format!(" ({n} not at rest yet)"),
        },
        text(&pool["booting"]),
        text(&pool["waiting"]),
    );
    if let Some(n) = pool["outdated"].as_u64().filter(|n| *n > 0) {
        out.push_str(&format!("       {n} of an older configuration, until they are replaced\n"));
    }
    if let Some(why) = pool["held"].as_str() {
        out.push_str(&format!("       no VM is made: {}\n", escape::line(why)));
    }
    if let Some(why) = v["isolation"]["why"].as_str().filter(|why| !why.is_empty()) {
        let word = text(&v["isolation"]["isolation"]);
        out.push_str(&format!("walls  isolation {word}: {why}\n"));
    }
    if let Some(counters) = v["counters"].as_object() {
        let list: Vec<String> =
            counters.iter().map(|(k, n)| format!("{} {n}", k.replace('_', " "))).collect();
        out.push_str(&format!("since  {}\n", list.join(", ")));
    }
    for thread in v["stuck"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        out.push_str(&format!("stuck: {}\n", escape::line(thread)));
    }
    if let Some(error) = v["last_error"].as_str() {
        out.push_str(&format!("last error: {}\n", escape::line(error)));
    }
    let heads = ["ID", "PID", "STATE", "SOURCE", "CPUS", "MIB", "AGE"];
    let mut rows = vec![heads.iter().map(|h| h.to_string()).collect::<Vec<_>>()];
    for vm in v["vms"].as_array().into_iter().flatten() {
        let mut row: Vec<String> = ["id", "pid", "state", "source", "cpus", "memory_mib"]
            .iter()
            .map(|k| text(&vm[*k]))
            .collect();
        row.push(vm["age_s"].as_u64().map_or("-".into(), age));
        rows.push(row);
    }
    if rows.len() > 1 {
        out.push_str(&table(&rows));
    }
    format!("{}\n", out.trim_end())
}
