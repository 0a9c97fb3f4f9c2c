//! SIGKILL of the server in each of its states, one after the other in one store: the
//! next one has a full pool, and nothing is there that is nobody's.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::daemon::{
    assert_nothing_left, directories, qemus, text, wait_for, Daemon, Dir, Options,
};
use crate::require_qemu;

/// Brings a server into a state; a client that was started for that.
type Walk = fn(&Daemon) -> Option<Child>;

/// Waits closely for a state that lasts milliseconds.
fn spin(what: &str, mut there: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while !there() {
        assert!(std::time::Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Whether some VM's directory has such a file.
fn any(daemon: &Daemon, file: &str, is: impl Fn(&str) -> bool) -> bool {
    let texts = directories(&daemon.store()).into_iter().map(|d| fs::read_to_string(d.join(file)));
    texts.flatten().any(|text| is(&text))
}

/// Has one VM more made, and another, until one was seen while it is made.
fn seen(daemon: &Daemon, there: impl Fn(usize) -> bool) {
    for more in 3..10 {
        daemon.wait_rest(more - 1);
        daemon.ok(&["resize", &more.to_string()]);
        let (mut caught, mut over) = (false, false);
        spin("a VM more", || {
            caught = there(more);
            over = directories(&daemon.store()).len() == more
                && !any(daemon, "vm.json", |t| t.contains("\"booting\""));
            caught || over
        });
        if caught {
            return;
        }
    }
    panic!("every VM was made before it was seen{}", daemon.log());
}

fn spawn(daemon: &Daemon) -> Option<Child> {
    // A directory, which comes before QEMU: killed in between, or when it has just started.
    seen(daemon, |all| directories(&daemon.store()).len() == all);
    None
}

fn boot(daemon: &Daemon) -> Option<Child> {
    let booting = |t: &str| t.contains("\"booting\"") && !t.contains("\"pid\":0");
    seen(daemon, |_| any(daemon, "vm.json", booting));
    None
}

fn ready(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    None
}

fn handing(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    let mut get = daemon.command(&["get", "--wait", "60"]);
    let get = get.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    spin("a claim", || any(daemon, "claim", |t| !t.is_empty()));
    Some(get)
}

fn waiting(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    daemon.ok(&["resize", "0"]);
    wait_for("an empty pool", || daemon.status()["pool"]["ready"] == 0);
    let mut get = daemon.command(&["get", "--wait", "60"]);
    let get = get.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("a claim in line", || daemon.status()["pool"]["waiting"] == 1);
    Some(get)
}

fn draining(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    daemon.ok(&["drain"]);
    None
}

fn stopping(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    daemon.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(3));
    None
}

fn restarting(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    daemon.signal(Signal::SIGUSR2);
    daemon.wait_log("server-restarting", 1);
    None
}

fn leaving(daemon: &Daemon) -> Option<Child> {
    daemon.wait_rest(2);
    daemon.signal(Signal::SIGUSR1);
    std::thread::sleep(Duration::from_millis(3));
    None
}

fn killed_in(options: &Options, walks: &[(&str, Walk)]) {
    let mut dir = Dir::new();
    for (state, walk) in walks {
        let mut daemon = Daemon::launch(options, dir);
        let client = walk(&daemon);
        daemon.signal(Signal::SIGKILL);
        daemon.wait();
        let before = daemon.log();
        let next = Daemon::launch(options, daemon.forsake());
        let mut kept = 0;
        if let Some(client) = client {
            let out = client.wait_with_output().unwrap();
            let id = text(&out.stdout).trim().to_string();
            if !id.is_empty() {
                kept = 1;
                assert_eq!(next.ok(&["exec", &id, "--", "echo", "mine"]), "mine\n", "{state}");
            }
        }
        next.wait_ready(options.pool);
        let told = || format!("{state}{before}{}", next.log());
        let all = options.pool + kept;
        wait_for(&format!("{all} QEMUs: {}", told()), || qemus(&next.dir.0).len() == all);
        wait_for(&format!("{all} directories: {}", told()), || {
            directories(&next.store()).len() == all
        });
        for id in next.ok(&["list"]).lines().skip(1).map(|l| l.split(' ').next().unwrap()) {
            next.ok(&["stop", id]);
        }
        dir = next.quit();
        assert_nothing_left(&dir.0);
    }
}

#[test]
fn a_server_killed_in_any_of_its_states_leaves_nothing_that_is_nobodys() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 2);
    killed_in(
        &options,
        &[
            ("spawn", spawn),
            ("boot", boot),
            ("ready", ready),
            ("handing", handing),
            ("waiting", waiting),
            ("draining", draining),
            ("stopping", stopping),
            ("restarting", restarting),
            ("leaving", leaving),
        ],
    );
}

fn creation(daemon: &Daemon) -> Option<Child> {
    daemon.wait_log("template-making", 1);
    std::thread::sleep(Duration::from_millis(1500));
    None
}

fn cloning(daemon: &Daemon) -> Option<Child> {
    boot(daemon)
}

#[test]
fn a_server_killed_while_it_makes_a_template_or_clones_leaves_nothing_either() {
    let prepared = require_qemu!();
    let template = Dir::new();
    let mut options = Options::pool(&prepared, 2);
    let path = template.0.join("template");
    options.more_factory = format!("enable_template = true\ntemplate_path = {path:?}\n");
    killed_in(&options, &[("template creation", creation), ("cloning", cloning)]);
}
