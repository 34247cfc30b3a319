"""Keys come from where Amazon's own tools have them; what gives none is told in one line."""

import datetime
import json
import os
import re
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from helpers import cli
from runs import PATIENCE

from millstream.errors import RequestError
from millstream.store import at, client

ROLE = "arn:aws:iam::123456789012:role/reader"
KEYS = {"AccessKeyId": "GIVEN", "SecretAccessKey": "secret", "Token": "its-token"}
SAML = (
    b"<ErrorResponse><Error><Code>ExpiredTokenException</Code><Message>Token\nexpired</Message></Error></ErrorResponse>"
)


class Answers(ThreadingHTTPServer):
    """A server that has an answer for some requests, and 404 for others; (status, body), or what gives them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answering)
        self.url, self.answers, self.asked = f"http://127.0.0.1:{self.server_port}", {}, []


class _Answering(BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.server.answers.get(f"{self.command} {self.path}", self.server.answers.get("", (404, b"")))
        status, body = found() if callable(found) else found
        self.server.asked.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(status)
        if status // 100 == 3:
            self.send_header("Location", body.decode())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def answers():
    with Answers() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def wants(monkeypatch, bucket, server, proxy, tmp_path):
    """Set the environment and the files of ~/.aws; what signs a request then is (key, session token)."""
    boto3.client("s3", endpoint_url=server).put_object(
        Bucket=bucket.removeprefix("s3://"), Key="a", Body=b"there", ACL="public-read"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("millstream.store.credentials._SOON", PATIENCE)  # `answers` may take its time on a busy machine

    def signed(environment, credentials="", config=""):
        for name, text in (("AWS_SHARED_CREDENTIALS_FILE", credentials), ("AWS_CONFIG_FILE", config)):
            (tmp_path / name).write_text(text)
            monkeypatch.setenv(name, str(tmp_path / name))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        client._client.cache_clear()  # which goes by the environment alone
        assert at(bucket).read("a") == b"there"
        return signer(proxy)

    return signed


def signer(proxy):
    """(key, session token) of the last request."""
    headers = proxy.asked[-1].headers
    key = re.search("Credential=([^/]+)/", headers.get("authorization", ""))
    return key and key[1], headers.get("x-amz-security-token")


def given(**more):
    return 200, json.dumps(KEYS | more).encode()


def token_file(tmp_path):
    (tmp_path / "token").write_text("a-token\n")
    return str(tmp_path / "token")


# --- the environment and profiles ----------------------------------------------


def test_keys_of_the_environment_and_of_profiles(wants, monkeypatch):
    ours = "".join(f"[{name}]\naws_access_key_id={name[-1]}\naws_secret_access_key=s\n" for name in ("default", "of x"))
    token = "[profile of x]\naws_session_token = of-x\n"
    assert wants({}, ours) == ("t", None)
    assert wants({"AWS_DEFAULT_PROFILE": "of x"}, ours, token) == ("x", "of-x")
    assert wants({"AWS_PROFILE": "default"}, ours, token) == ("t", None)
    environment = {"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "of-e"}
    assert wants(environment, ours, token) == ("E", "of-e")
    assert wants({"AWS_SKIP_SIGNATURE": "true"}, ours, token) == (None, None)


def test_the_endpoint_of_s3_comes_first_and_then_that_of_all(wants, monkeypatch, proxy):
    keys, dead = "[default]\naws_access_key_id=D\naws_secret_access_key=s\n", "http://127.0.0.1:9"
    services = f"[services mine]\nsts =\n  endpoint_url = {dead}\ns3 =\n  endpoint_url = {proxy.url}\n"
    assert wants({"AWS_ENDPOINT_URL": dead, "AWS_ENDPOINT_URL_S3": proxy.url}, keys)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    assert wants({}, keys, f"[default]\nservices = mine\nendpoint_url = {dead}\n{services}")
    assert wants({}, keys, f"[default]\nendpoint_url = {proxy.url}\n")


def test_a_process_gives_keys(wants, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text(f"print('''{json.dumps({**KEYS, 'Version': 1, 'SessionToken': 'its'})}''')")
    assert wants({}, "", f'[default]\ncredential_process = {sys.executable} "{script}"\n') == ("GIVEN", "its")
    for text, told in (
        ("import sys; sys.exit('log in first')", "log in first"),
        ("print('no JSON')", "no keys"),
        (f"print('''{json.dumps({**KEYS, 'Expiration': 'soon'})}''')", "no keys .their Expiration: .*soon"),
    ):
        script.write_text(text)
        with pytest.raises(RequestError, match=f"credential_process .*{told}"):
            wants({}, "", f'[default]\ncredential_process = {sys.executable} "{script}"\n')
    with pytest.raises(RequestError, match=r"credential_process .* cannot be run: No closing quotation"):
        wants({}, "", "[default]\ncredential_process = 'gives-keys\n")


def test_keys_of_a_process_expire_by_universal_time_where_it_names_no_zone(wants, tmp_path):
    script = tmp_path / "gives.py"
    script.write_text(f"print('''{json.dumps({**KEYS, 'Expiration': '2199-01-01T00:00:00'})}''')")
    assert wants({}, "", f"[default]\ncredential_process = {sys.executable} {script}\n")[0] == "GIVEN"


def test_a_process_that_gives_keys_leaves_standard_input_alone(bucket, tmp_path, monkeypatch):
    keys = {"AccessKeyId": os.environ["AWS_ACCESS_KEY_ID"], "SecretAccessKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    script = tmp_path / "gives.py"
    script.write_text(f"import sys; sys.stdin.read(); print('''{json.dumps(keys)}''')")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    text = b"".join(b'{"text": "document %d"}\n' % number for number in range(100))
    environment = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    done = cli("pack", "-", "--out", f"{bucket}/run", "--json", stdin=text, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ledger"]["documents"]["in"] == 100


def test_a_profile_that_is_not_there(wants):
    with pytest.raises(RequestError, match=r"there is no AWS profile mistyped in ~/.aws: mend AWS_PROFILE"):
        wants({"AWS_PROFILE": "mistyped"})


# --- who gives keys that expire --------------------------------------------------


def test_a_web_identity(wants, server, tmp_path, monkeypatch, bucket):
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server)
    path = token_file(tmp_path)
    key, token = wants({"AWS_WEB_IDENTITY_TOKEN_FILE": path, "AWS_ROLE_ARN": ROLE})
    assert key.startswith("ASIA")
    assert token
    name = bucket.removeprefix("s3://")
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}/mine?uploads", method="POST")).close()
    at(bucket).sweep()
    with urllib.request.urlopen(f"{server}/{name}?uploads") as answer:
        assert b"<UploadId>" not in answer.read()
    for variable in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(variable)
    config = f"[profile of-pod]\nrole_arn = {ROLE}\nweb_identity_token_file = {path}\n"
    assert wants({"AWS_PROFILE": "of-pod"}, "", config)[0].startswith("ASIA")


def test_a_web_identity_that_is_refused(wants, answers, tmp_path):
    answers.answers["POST /"] = 400, SAML
    how = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": token_file(tmp_path),
        "AWS_ROLE_ARN": ROLE,
        "AWS_ENDPOINT_URL_STS": answers.url,
    }
    with pytest.raises(
        RequestError, match=f"{answers.url} gives no keys .*{ROLE} .ExpiredTokenException: Token expired.: "
    ):
        wants(how)
    with pytest.raises(RequestError, match=r"nowhere, with a token .*No such file"):
        wants({**how, "AWS_WEB_IDENTITY_TOKEN_FILE": "nowhere"})
    with pytest.raises(OSError, match=r"cannot reach http://127.0.0.1:9 .*refused"):
        wants({**how, "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"})


@pytest.mark.parametrize("by", ["value", "file", "nothing"])
def test_a_container(wants, answers, tmp_path, by):
    answers.answers["GET /keys"] = given(Expiration="2199-01-01T00:00:00Z")
    how = {
        "value": {"AWS_CONTAINER_AUTHORIZATION_TOKEN": "a-token"},
        "file": {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token_file(tmp_path)},
        "nothing": {},
    }[by]
    assert wants({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{answers.url}/keys", **how}) == ("GIVEN", "its-token")
    [headers] = answers.asked
    assert headers.get("authorization") == (None if by == "nothing" else "a-token")


def test_a_container_that_gives_none(wants, answers):
    with pytest.raises(RequestError, match=r"/nothing gives no keys .404 Not Found.: mend AWS_CONTAINER_CRED"):
        wants({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{answers.url}/nothing"})
    with pytest.raises(RequestError, match=r"http://elsewhere/keys is asked for no keys"):
        wants({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://elsewhere/keys"})
    answers.answers["GET /odd"] = 200, b"<html>"
    with pytest.raises(RequestError, match="/odd gives no keys"):
        wants({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{answers.url}/odd"})


def test_a_token_is_for_nobody_else(wants, answers):
    answers.answers |= {"GET /keys": (302, b"/elsewhere"), "GET /elsewhere": given()}
    with pytest.raises(RequestError, match=r"/keys gives no keys .302 Found"):
        wants({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{answers.url}/keys", "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a"})
    assert len(answers.asked) == 1


OF_MACHINES = "/latest/meta-data/iam/security-credentials/"


@pytest.mark.parametrize("version", [1, 2])
def test_a_machine_of_amazons(wants, answers, version):
    answers.answers |= {f"GET {OF_MACHINES}": (200, b"a-role"), f"GET {OF_MACHINES}a-role": given(Code="Success")}
    if version == 2:
        answers.answers["PUT /latest/api/token"] = 200, b"of-session"
    found = wants({"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": answers.url})
    assert found == ("GIVEN", "its-token")
    wanted = "of-session" if version == 2 else None
    assert [headers.get("x-aws-ec2-metadata-token") for headers in answers.asked] == [None, wanted, wanted]


def test_what_a_kill_left_stays_where_a_machine_gives_no_keys_for_a_while(wants, answers, bucket):
    answers.answers |= {f"GET {OF_MACHINES}": (200, b"a-role"), f"GET {OF_MACHINES}a-role": given()}
    wants({"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": answers.url})
    answers.answers.clear()
    at(bucket).sweep()
    assert at(bucket).read("a") == b"there"


@pytest.mark.parametrize("answer", [(404, b""), (200, b"<html>\n a portal"), (200, b""), (500, b"")], ids=str)
def test_what_is_no_machine_of_amazons(wants, answers, answer):
    answers.answers[""] = answer
    with pytest.raises(RequestError, match="found no credentials for s3://"):
        wants({"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": answers.url})


def test_keys_are_renewed_before_they_expire_and_the_old_ones_serve_while_that_fails(wants, answers, bucket, proxy):
    now = datetime.datetime.now(datetime.UTC)
    soon = [(now + datetime.timedelta(seconds=seconds)).isoformat() for seconds in (280, 290, 9999)]
    turns = [given(AccessKeyId=f"K{number}", Expiration=until) for number, until in enumerate(soon)]
    turns.insert(1, (403, b""))
    answers.answers["GET /keys"] = lambda: turns.pop(0)
    seen = [wants({"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{answers.url}/keys"})[0]]
    while turns:
        at(bucket).read("a")
        seen.append(signer(proxy)[0])
    at(bucket).read("a")
    assert [*dict.fromkeys([*seen, signer(proxy)[0]])] == ["K0", "K1", "K2"]


# --- what takes Amazon's own client ----------------------------------------------


ASSUMING = (
    f"[profile base]\naws_access_key_id=B\naws_secret_access_key=s\n[profile r]\nrole_arn={ROLE}\nsource_profile=base\n"
)
SSO = (
    "[profile s]\nsso_session=corp\nsso_account_id=123456789012\nsso_role_name=r\n[sso-session corp]\n"
    "sso_region=us-east-1\nsso_start_url=https://sso.example.org/start\n"
)


def test_a_role_of_another_profile(wants, server):
    key, token = wants({"AWS_PROFILE": "r", "AWS_ENDPOINT_URL_STS": server}, "", ASSUMING)
    assert key.startswith("ASIA")
    assert token


def test_single_sign_on_that_is_over(wants, tmp_path):
    with pytest.raises(RequestError, match=r"profile s gives no keys .*aws sso login --profile s") as error:
        wants({"AWS_PROFILE": "s", "HOME": str(tmp_path)}, "", SSO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "config"), [("r", ASSUMING), ("s", SSO)])
def test_without_that_client_it_is_told_what_to_do(wants, monkeypatch, name, config):
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(
        RequestError, match=f"pip install boto3, or eval .*export-credentials --profile {name} --format env"
    ):
        wants({"AWS_PROFILE": name}, "", config)


def test_the_command_line_says_it_in_one_line(bucket, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some"}\n')
    done = cli("pack", tmp_path, "--out", f"{bucket}/run", AWS_ACCESS_KEY_ID="", AWS_PROFILE="mistyped")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no AWS profile mistyped" in done.stderr
