//! Real peers, named by `tests/interop/run` and ignored without it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use vmcache::agent::{Error, ProcessId};
use vmcache::config::Config;
use vmcache::factory::{direct, Wanted};
use vmcache::proto::agent::CreateSandboxRequest;
use vmcache::proto::oci::Process;

use crate::conformance::{assert_walked, walk};
use crate::daemon::{assert_nothing_left, prepared, text, vmcache, wait_for, Daemon, Dir, Options};
use crate::transports::vsock_device;

const KATA3_PARAMETERS: &str =
    "kernel_params = \"cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1\"\n";
const SOON: Duration = Duration::from_secs(30);

fn named(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set")).into()
}

/// A VM whose guest is another's.
fn options(initrd: &str) -> Options {
    let mut options = Options::pool(&prepared().unwrap(), 1);
    options.initrd = named(initrd).display().to_string();
    options.memory = 512;
    options
}

fn kata3() -> Options {
    let mut options = options("KATA3_INITRD");
    options.more_ours.push_str(&vsock_device(&prepared().unwrap()));
    options.more_qemu = KATA3_PARAMETERS.into();
    options
}

fn kata1(proxy: &str) -> Options {
    let mut options = options("KATA1_INITRD");
    if let Some(kernel) = std::env::var_os("KATA1_KERNEL") {
        options.kernel = PathBuf::from(kernel).display().to_string();
    }
    options.more_qemu = format!(
        "kernel_params = \"agent.use_vsock=false\"\n[agent.kata]\nprotocol = \"grpc\"\n{proxy}"
    );
    options
}

/// Kata's agents of 2.x and later tell a signal's number as if it were a code, list
/// no processes, and power their guest off when the sandbox ends.
#[test]
#[ignore = "needs a kata-agent of 3.x: tests/interop/run"]
fn kata_agent_of_version_3() {
    let dir = Dir::new();
    assert_walked(&walk(&kata3(), &dir), &KATA3_DIFFERS);
}

/// Runs a case in a VM that has the vsock of a host's kernel, where this machine has
/// none; whether it did.
fn elsewhere(case: &str, initrd: &Path) -> bool {
    if Path::new("/dev/vhost-vsock").exists() {
        return false;
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nested/run");
    let status = Command::new(script)
        .arg(prepared().unwrap())
        .arg(env!("CARGO_BIN_EXE_vmcache"))
        .arg(std::env::current_exe().unwrap())
        .arg(format!("interop::{case}"))
        .arg(initrd)
        .status()
        .unwrap();
    assert!(status.success(), "{case} in a VM");
    true
}

/// Walks an agent over the vsock of the host's kernel.
fn walk_over_vsock(case: &str, initrd: PathBuf, more_qemu: &str, but: &[(&str, &str)]) {
    if elsewhere(case, &initrd) {
        return;
    }
    let mut options = Options::pool(&prepared().unwrap(), 1);
    options.initrd = initrd.display().to_string();
    options.memory = 512;
    options.timeout = 600;
    options.more_qemu = more_qemu.into();
    options.more_ours.push_str("transport = \"vsock\"\n");
    assert_walked(&walk(&options, &Dir::new()), but);
}

/// The guest's initramfs: the VM's own one when this runs there.
fn here_or(variable: &str) -> PathBuf {
    std::env::var_os("NESTED_INITRD").map_or_else(|| named(variable), PathBuf::from)
}

pub const KATA3_DIFFERS: [(&str, &str); 4] =
    [("pids", "unsupported"), ("table", "unsupported"), ("killed", "9"), ("main killed", "9")];

#[test]
#[ignore = "takes minutes: tests/interop/run"]
fn our_agent_over_vsock() {
    let own = prepared().unwrap().join("initramfs.img");
    let initrd = std::env::var_os("NESTED_INITRD").map_or(own, PathBuf::from);
    walk_over_vsock("our_agent_over_vsock", initrd, "", &[]);
}

#[test]
#[ignore = "needs a kata-agent of 3.x: tests/interop/run"]
fn kata_agent_of_version_3_over_vsock() {
    let case = "kata_agent_of_version_3_over_vsock";
    walk_over_vsock(case, here_or("KATA3_INITRD"), KATA3_PARAMETERS, &KATA3_DIFFERS);
}

#[test]
#[ignore = "needs a kata-agent of 1.x: tests/interop/run"]
fn kata_agent_of_version_1_over_vsock() {
    let case = "kata_agent_of_version_1_over_vsock";
    let more = "kernel_params = \"agent.use_vsock=true\"\n[agent.kata]\nprotocol = \"grpc\"\n";
    walk_over_vsock(case, here_or("KATA1_INITRD"), more, &[]);
}

#[test]
#[ignore = "needs a kata-agent of 3.x: tests/interop/run"]
fn pool_of_kata_agents_of_version_3() {
    pool_runs_a_root(&kata3());
}

/// Fills a pool, runs a command in a root of its own, and leaves nothing.
fn pool_runs_a_root(options: &Options) {
    let daemon = Daemon::start(options);
    daemon.wait_rest(options.pool);
    let root = daemon.dir.0.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let root = root.display().to_string();
    let script = "busybox cat; busybox echo err >&2; exit 6";
    let mut command = daemon.command(&["run", "--rootfs", &root, "--"]);
    command.args(["/bin/busybox", "sh", "-c", script]);
    let out = crate::daemon::feed(command, b"through\n");
    let said = (out.status.code(), text(&out.stdout), text(&out.stderr));
    assert_eq!(said, (Some(6), "through\n".into(), "err\n".into()), "{}", daemon.log());
    let out = daemon.output(&["run", "--", "true"]);
    assert_eq!(out.status.code(), Some(125));
    assert!(text(&out.stderr).contains("use --rootfs"), "{}", text(&out.stderr));
    let dir = daemon.quit();
    assert_nothing_left(&dir.0);
}

#[test]
#[ignore = "needs a kata-agent of 1.x: tests/interop/run"]
fn kata_agent_of_version_1() {
    let dir = Dir::new();
    assert_walked(&walk(&kata1(""), &dir), &[]);
    pool_runs_a_root(&kata1(""));
}

#[test]
#[ignore = "needs a kata-agent of 1.x and a kata-proxy: tests/interop/run"]
fn kata_agent_of_version_1_through_its_own_proxy() {
    let dir = Dir::new();
    let proxy = format!("[proxy.kata]\npath = {:?}\n", named("KATA_PROXY"));
    assert_walked(&walk(&kata1(&proxy), &dir), &[]);
    pool_runs_a_root(&kata1(&proxy));
}

#[test]
#[ignore = "needs a kata-agent of 1.x: tests/interop/run"]
fn clones_of_a_kata_agent_of_version_1() {
    let mut options = kata1("");
    options.pool = 2;
    options.more_factory = "enable_template = true\n".into();
    let dir = Dir::new();
    options.more_factory.push_str(&format!("template_path = {:?}\n", dir.0.join("t")));
    pool_runs_a_root(&options);
}

#[test]
#[ignore = "needs a hyperstart: tests/interop/run"]
fn hyperstart() {
    let dir = Dir::new();
    let mut options = options("HYPERSTART_INITRD");
    options.more_ours.push_str("agent = \"hyperstart\"\n");
    let config = Config::parse(Path::new("test.toml"), &options.text(&dir.0)).unwrap();
    let (vm, agent) = direct::cold(&config, &Wanted::default(), true, &|_| {}).unwrap();
    assert_eq!(agent.version().unwrap().0, "4244");
    let sandbox = CreateSandboxRequest { hostname: "h".into(), ..Default::default() };
    agent.start_sandbox(sandbox).unwrap();
    let process = |args: &[&str]| Process {
        Args: args.iter().map(|a| a.to_string()).collect(),
        Cwd: "/".into(),
        ..Default::default()
    };
    let id = |exec: &str| ProcessId { container: "hyperstart".into(), exec: exec.into() };
    let read = |id: &ProcessId| {
        let mut all: Vec<u8> = Vec::new();
        loop {
            let bytes = agent.read_process_stdout(id, 4096).unwrap();
            if bytes.is_empty() {
                return all;
            }
            all.extend(bytes);
        }
    };
    let three = id("three");
    agent.exec(&three, process(&["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])).unwrap();
    assert_eq!(read(&three), b"out\n");
    assert_eq!(agent.read_process_stderr(&three, 100).unwrap(), b"err\n");
    assert_eq!(agent.wait_process(&three, Some(SOON)).unwrap(), 3);
    // Much more than hyperstart keeps.
    let cat = id("cat");
    agent.exec(&cat, process(&["/bin/cat"])).unwrap();
    let bytes: Vec<u8> = (0..40_000u32).map(|i| (i % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let n = agent.write_process_stdin(&cat, rest.to_vec()).unwrap();
                rest = &rest[n as usize..];
            }
            agent.close_process_stdin(&cat).unwrap();
        });
        assert!(read(&cat) == bytes);
    });
    assert_eq!(agent.wait_process(&cat, Some(SOON)).unwrap(), 0);
    assert!(matches!(agent.guest_details(), Err(Error::Unsupported { .. })));
    // Another connection finds the guest as this one left it.
    agent.disconnect();
    let again = vm.connect_agent().unwrap();
    again.check(SOON).unwrap();
    again.stop_sandbox().unwrap();
    wait_for("the guest's end", || !vm.alive());
    vm.destroy();
    assert_nothing_left(&dir.0);
}

/// Kata 1.13's own library, told of a server of ours.
fn katas_client(args: &[&str]) -> Value {
    let out = Command::new(named("KATA1_CLIENT"))
        .arg("-config")
        .arg(named("KATA1_CONFIG"))
        .args(args)
        .output()
        .unwrap();
    let said = || format!("{}\n{}", text(&out.stdout), text(&out.stderr));
    let json = text(&out.stdout);
    let json = json.find('{').map_or("", |i| &json[i..]);
    serde_json::Deserializer::from_str(json)
        .into_iter::<Value>()
        .next()
        .and_then(Result::ok)
        .unwrap_or_else(|| panic!("no JSON: {}", said()))
}

/// A server of ours with the client's own file, and what only we read in a drop-in.
fn server_for_katas_client() -> (std::process::Child, Dir, PathBuf) {
    let dir = Dir::new();
    let theirs = fs::read_to_string(named("KATA1_CONFIG")).unwrap();
    let config = dir.0.join("configuration.toml");
    fs::write(&config, &theirs).unwrap();
    fs::create_dir(dir.0.join("conf.d")).unwrap();
    let ours = "[agent.kata]\nprotocol = \"grpc\"\n[vmcache]\naccel = \"tcg\"\nboot_timeout = 90\n";
    fs::write(dir.0.join("conf.d/ours.toml"), ours).unwrap();
    let log = fs::File::create(dir.0.join("log")).unwrap();
    let mut command = vmcache(&config);
    command.args(["serve", "--log", "stderr"]).stderr(Stdio::from(log));
    let child = command.spawn().unwrap();
    wait_for("a VM in the pool", || {
        let out = vmcache(&config).args(["status", "--json"]).output().unwrap();
        let status: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        status["pool"]["ready"].as_u64() > Some(0)
    });
    (child, dir, config)
}

fn quit(mut server: std::process::Child, config: &Path) {
    let out: Output = vmcache(config).arg("quit").output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(server.wait().unwrap().success());
}

#[test]
#[ignore = "needs Kata 1.13's client: tests/interop/run"]
fn katas_client_takes_our_vms() {
    let (server, dir, config) = server_for_katas_client();
    let log = || fs::read_to_string(dir.0.join("log")).unwrap();
    for args in [&[][..], &["-vcpus", "2"]] {
        let said = katas_client(args);
        assert_eq!(said["via_grpc"], true, "{said:#}\n{}", log());
        assert!(said["error"].as_str().unwrap_or_default().is_empty(), "{said:#}\n{}", log());
        assert!(said["fallback"].as_str().unwrap_or_default().is_empty(), "{said:#}");
        wait_for("the next VM", || log().matches("vm-ended").count() > 0);
    }
    quit(server, &config);
}

#[test]
#[ignore = "needs Kata 1.13's client: tests/interop/run"]
fn katas_client_runs_a_sandbox_in_our_vm() {
    let (server, dir, config) = server_for_katas_client();
    let log = || fs::read_to_string(dir.0.join("log")).unwrap();
    let bundle = named("KATA1_BUNDLE").display().to_string();
    let said = katas_client(&["-sandbox", "-bundle", &bundle]);
    assert_eq!(said["via_grpc"], true, "{said:#}\n{}", log());
    assert!(said["error"].as_str().unwrap_or_default().is_empty(), "{said:#}\n{}", log());
    wait_for("the VM's end", || log().contains("vm-ended"));
    quit(server, &config);
}

#[test]
#[ignore = "needs a Kata 1.13 server: tests/interop/run"]
fn our_client_takes_katas_vms() {
    let config = named("KATA1_CONFIG");
    let mut server = Command::new(named("KATA1_SERVER"))
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = || {
        let out = vmcache(&config).args(["status", "--json"]).output().unwrap();
        serde_json::from_slice::<Value>(&out.stdout).unwrap_or_default()
    };
    wait_for("a VM in the pool", || status()["vms"].as_array().is_some_and(|vms| !vms.is_empty()));
    let mut get = vmcache(&config);
    let out = get.args(["get", "--json"]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let got: Value = serde_json::from_slice(&out.stdout).unwrap();
    let id = got["id"].as_str().unwrap();
    assert!(got["agent_url"].as_str().unwrap().starts_with("unix:///run/vc/sbs/"), "{got}");
    let out = vmcache(&config).args(["stop", id]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(!Path::new("/run/vc/vm").join(id).exists());
    assert!(!Path::new("/run/vc/sbs").join(id).exists());

    let dir = Dir::new();
    fs::create_dir_all(dir.0.join("root/bin")).unwrap();
    fs::copy("/bin/busybox", dir.0.join("root/bin/busybox")).unwrap();
    let mut run = vmcache(&config);
    run.args(["run", "--rootfs"]).arg(dir.0.join("root"));
    run.args(["--", "/bin/busybox", "sh", "-c", "echo in $0; exit 5", "kata"]);
    let out = run.output().unwrap();
    assert_eq!(out.status.code(), Some(5), "{}", text(&out.stderr));
    assert_eq!(text(&out.stdout), "in kata\n");

    let out = vmcache(&config).arg("quit").output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let mut said = String::new();
    server.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(server.wait().is_ok(), "{said}");
    let left = fs::read_dir("/run/vc/vm").map_or(0, |d| d.flatten().count());
    assert_eq!(left, 0, "{said}");
}
