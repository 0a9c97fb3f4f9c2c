//! The interface of agents, in hyperstart's words.

use super::*;

impl Agent for Hyperstart {
    fn kind(&self) -> Kind {
        Kind::Hyperstart
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { block_devices: true, block_device_hotplug: true, resize: true }
    }

    fn configure(&mut self, seat: &Seat) -> Outcome<Vec<Channel>> {
        self.address = Address::of(Kind::Hyperstart, &seat.dir, seat.way);
        let (control, stream) = self.config.sockets(&seat.dir);
        let port = |i: u32, socket| Channel::Port { name: format!("sh.hyper.channel.{i}"), socket };
        Ok(vec![port(0, control), port(1, stream)])
    }

    fn configure_from_grpc(&mut self, config: &[u8]) -> Outcome<()> {
        let value = seat::config_object(config)?;
        self.config =
            serde_json::from_value(value).map_err(|e| Error::Config { why: e.to_string() })?;
        Ok(())
    }

    fn set_proxy_from_grpc(&mut self, vm: &crate::proto::cache::GrpcVM) -> Outcome<()> {
        self.address.told(&vm.proxyURL)
    }

    fn address(&self) -> &Address {
        &self.address
    }

    fn reuse(&mut self, other: Box<dyn Agent>) -> Outcome<()> {
        self.slot.take_over(&mut self.address, other, |link| match link {
            Link::Hyperstart(link) => Some(link),
            _ => None,
        })
    }

    fn give_link(self: Box<Self>) -> Option<Link> {
        self.slot.take().map(Link::Hyperstart)
    }

    fn share_path(&self, sandbox: &str) -> PathBuf {
        Path::new("/run/hyper/shared/sandboxes").join(sandbox)
    }

    fn connect(&self, within: Duration, booting: bool) -> Outcome<()> {
        self.slot.get(|| self.open(within, booting)).map(|_| ())
    }

    fn disconnect(&self) {
        self.slot.take();
    }

    fn hang_up(&self) {
        if let Some(link) = self.slot.take() {
            link.hang_up("the connection was given up");
        }
    }

    fn check(&self, within: Duration) -> Outcome<()> {
        let link = self.slot.get(|| self.open(within, false))?;
        link.call(Code::Ping, &[], within).map(|_| ()).map_err(|e| failed("Check", e))
    }

    fn version(&self) -> Outcome<(String, String)> {
        let bytes = self.command("Version", Code::GetVersion, &Value::Null)?;
        let number = <[u8; 4]>::try_from(bytes).map_or(0, u32::from_be_bytes);
        Ok((number.to_string(), "hyperstart".into()))
    }

    fn guest_details(&self) -> Outcome<GuestDetailsResponse> {
        no("GetGuestDetails")
    }

    /// All that there are, and only some time after this has returned.
    fn online_cpu_mem(&self, _: u32, _: bool) -> Outcome<()> {
        self.command("OnlineCPUMem", Code::OnlineCpuMem, &Value::Null).map(|_| ())
    }

    fn mem_hotplug_by_probe(&self, _: &[u64]) -> Outcome<()> {
        no("MemHotplugByProbe")
    }

    fn reseed_rng(&self, _: &[u8]) -> Outcome<()> {
        no("ReseedRandomDev")
    }

    fn set_guest_date_time(&self, _: Duration) -> Outcome<()> {
        no("SetGuestDateTime")
    }

    fn copy_file(&self, _: CopyFileRequest) -> Outcome<()> {
        no("CopyFile")
    }

    fn list_interfaces(&self) -> Outcome<Vec<Interface>> {
        no("ListInterfaces")
    }

    fn update_interface(&self, interface: Interface) -> Outcome<Interface> {
        let message = messages::interface(&interface)?;
        self.command("UpdateInterface", Code::SetupInterface, &message)?;
        Ok(interface)
    }

    fn list_routes(&self) -> Outcome<Vec<Route>> {
        no("ListRoutes")
    }

    /// Adds them to those that there are.
    fn update_routes(&self, routes: Vec<Route>) -> Outcome<Vec<Route>> {
        self.command("UpdateRoutes", Code::SetupRoute, &messages::routes(&routes))?;
        Ok(routes)
    }

    fn start_sandbox(&self, request: CreateSandboxRequest) -> Outcome<()> {
        let call = "CreateSandbox";
        if self.sandbox.swap(true, Ordering::SeqCst) {
            let text = "the sandbox is there already".to_string();
            return Err(Error::Refused { call, code: Status::ALREADY_EXISTS, text });
        }
        let started = self.command(call, Code::StartPod, &messages::pod(&request));
        if started.is_err() {
            self.sandbox.store(false, Ordering::SeqCst);
        }
        started.map(|_| ())
    }

    /// The guest powers off; its last answer may be lost with it. Containers are
    /// killed before: of one that catches SIGTERM there would never be an answer.
    fn stop_sandbox(&self) -> Outcome<()> {
        let link = self.link()?;
        for key in link.running().into_iter().filter(|k| k.process == INIT) {
            let message = json!({"container": key.container, "signal": 9});
            // It may end by itself meanwhile.
            let _ = self.command("DestroySandbox", Code::KillContainer, &message);
        }
        let done = self.power_off();
        link.close("the guest has powered off");
        done
    }

    fn create_container(&self, request: CreateContainerRequest) -> Outcome<()> {
        let call = "CreateContainer";
        // What can not be is refused now, and not at its start.
        messages::container(&request, json!({}))?;
        let key = Key { container: request.container_id.clone(), process: INIT.into() };
        let lives = !self.link()?.ended(&key);
        let mut created = self.created();
        if lives || created.contains_key(&request.container_id) {
            let text = format!("container {:?} is there already", request.container_id);
            return Err(Error::Refused { call, code: Status::ALREADY_EXISTS, text });
        }
        if created.len() >= MAX_CREATED {
            let why = format!("{MAX_CREATED} containers wait to be started");
            return Err(Error::Request { call, why });
        }
        created.insert(request.container_id.clone(), request);
        Ok(())
    }

    fn start_container(&self, container: &str) -> Outcome<()> {
        let call = "StartContainer";
        let id = ProcessId { container: container.into(), exec: String::new() };
        let request = self.created().remove(container).ok_or_else(|| missing(call, &id))?;
        let process = request.OCI.Process.clone().unwrap_or_default();
        let made = |p| Ok((Code::NewContainer, messages::container(&request, p)?));
        let started = self.launch(call, &id, &process, made);
        if started.is_err() {
            self.created().insert(container.into(), request);
        }
        started
    }

    fn stop_container(&self, container: &str, within: Duration) -> Outcome<()> {
        let call = "RemoveContainer";
        if self.created().remove(container).is_some() {
            return Ok(());
        }
        let link = self.link()?;
        let key = Key { container: container.into(), process: INIT.into() };
        if !link.ended(&key) {
            let message = json!({"container": container, "signal": 9});
            match self.command(call, Code::KillContainer, &message) {
                // It has ended, and the news is on its way.
                Ok(_) | Err(Error::Refused { .. }) => {}
                Err(e) => return Err(e),
            }
            link.wait(&key, Some(within)).map_err(|e| failed(call, e))?;
        }
        // hyperstart removes a container itself when its streams have ended, and dies
        // when it is told to before.
        link.forget(&key);
        Ok(())
    }

    fn update_container(&self, _: &str, _: LinuxResources) -> Outcome<()> {
        no("UpdateContainer")
    }

    fn stats_container(&self, _: &str) -> Outcome<StatsContainerResponse> {
        no("StatsContainer")
    }

    fn pause_container(&self, _: &str) -> Outcome<()> {
        no("PauseContainer")
    }

    fn resume_container(&self, _: &str) -> Outcome<()> {
        no("ResumeContainer")
    }

    fn process_list_container(&self, _: &str, _: ListFormat, _: &[String]) -> Outcome<Vec<u8>> {
        no("ListProcesses")
    }

    fn exec(&self, id: &ProcessId, process: Process) -> Outcome<()> {
        let container = id.container.clone();
        self.launch("ExecProcess", id, &process, |p| {
            Ok((Code::ExecCmd, messages::exec(&container, p)))
        })
    }

    fn signal_process(&self, id: &ProcessId, signal: u32) -> Outcome<()> {
        let call = "SignalProcess";
        if id.container == GUEST {
            let why = "hyperstart can signal no process of the guest itself".into();
            return Err(Error::Request { call, why });
        }
        let (code, message) = match id.exec.as_str() {
            "" => (Code::KillContainer, json!({"container": id.container, "signal": signal})),
            exec => (
                Code::SignalProcess,
                json!({"container": id.container, "process": exec, "signal": signal}),
            ),
        };
        self.command(call, code, &message).map(|_| ())
    }

    fn wait_process(&self, id: &ProcessId, within: Option<Duration>) -> Outcome<i32> {
        self.link()?.wait(&key(id), within).map_err(|e| failed("WaitProcess", e))
    }

    /// At most 512 bytes: hyperstart keeps no more for a process that does not read,
    /// and says nothing of what it drops. Two commands that do nothing make sure
    /// that it has handed them on before more come, unless that process reads
    /// nothing at all and has 62464 bytes waiting already.
    fn write_process_stdin(&self, id: &ProcessId, data: Vec<u8>) -> Outcome<u32> {
        let call = "WriteStdin";
        let link = self.link()?;
        let sequences = link.sequences(&key(id)).ok_or_else(|| missing(call, id))?;
        let piece = &data[..data.len().min(STDIN)];
        if piece.is_empty() {
            return Ok(0);
        }
        link.send(sequences.stdio, piece).map_err(|e| failed(call, e))?;
        for _ in 0..2 {
            link.call(Code::Ping, &[], CALL).map_err(|e| failed(call, e))?;
        }
        Ok(piece.len() as u32)
    }

    fn close_process_stdin(&self, id: &ProcessId) -> Outcome<()> {
        let call = "CloseStdin";
        let link = self.link()?;
        let sequences = link.sequences(&key(id)).ok_or_else(|| missing(call, id))?;
        // A terminal ignores the frame that ends a pipe.
        let end: &[u8] = if sequences.stderr == 0 { &[END_OF_INPUT] } else { &[] };
        link.send(sequences.stdio, end).map_err(|e| failed(call, e))
    }

    fn read_process_stdout(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>> {
        self.read("ReadStdout", id, Stream::Out, max)
    }

    fn read_process_stderr(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>> {
        self.read("ReadStderr", id, Stream::Err, max)
    }

    fn winsize_process(&self, id: &ProcessId, rows: u32, columns: u32) -> Outcome<()> {
        let key = key(id);
        let message = json!({
            "container": key.container, "process": key.process, "row": rows, "column": columns,
        });
        self.command("TtyWinResize", Code::WinSize, &message).map(|_| ())
    }
}
