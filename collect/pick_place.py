"""Pick-and-place with a distractor, from state or camera: environment, scripted demonstrator, Minari dataset.

    python -m collect.pick_place                  # 10 noisy demonstrations, a few seconds
    python -m collect.pick_place --episodes 100 --dataset-id cal-ql/pick-place/broad-v0
    python -m collect.pick_place --camera         # 500 with images in place of the state, minutes; resumable

A Fetch arm has to put the red cube on the green tray; a blue cube lies in the way and does not matter. The reward
is 1 on success, which ends the episode, and 0 otherwise; an episode lasts 40 steps. With the camera it is a public
counterpart of the paper's visual manipulation task (appendix G.4), from the state that task's relative: narrow
scripted data, sparse reward, contact.
"""

import atexit
import dataclasses
import importlib
import os
import pathlib
import re
import shutil
import sys
import warnings

try:
    import mujoco
except Exception as error:  # if MUJOCO_GL names a library, that is loaded with MuJoCo, whether it will be used or not
    if __name__ != "__main__":
        raise
    print(f"error: MuJoCo does not start ({error}): unset MUJOCO_GL, or install what it names.", file=sys.stderr)
    sys.exit(2)

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import tyro
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium_robotics.envs.fetch.fetch_env import MujocoFetchEnv
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from tqdm import tqdm

FETCH_XML = pathlib.Path(gymnasium_robotics.__file__).parent / "envs/assets/fetch/pick_and_place.xml"
CUBE = 0.025  # half the edge of both cubes, in metres
TRAY = np.array([1.34, 0.95, 0.405])  # centre of the tray: 10 mm thick, on a table whose top is at z = 0.4
TRAY_HALF = np.array([0.07, 0.07, 0.005])
WORKSPACE = np.array([1.34, 0.80, 0.47])  # positions are reported relative to this point ...
REACH = 0.15  # ... and in units of this many metres, which brings them to about -1 .. 1
CUBES_LOW, CUBES_HIGH = np.array([1.24, 0.60]), np.array([1.44, 0.82])  # where the cubes may start (x, y)
CAMERA = {"lookat": np.array([1.33, 0.79, 0.45]), "distance": 0.62, "azimuth": 155.0, "elevation": -40.0}
PIXELS = 64  # height and width of the camera's frames


class PickPlaceScene(MujocoFetchEnv):
    """The simulation: Fetch's own pick-and-place scene with the cube painted red, plus a blue cube and a green tray.

    Observations are the base class's dictionaries; wrap it in `StateObservation` or `CameraObservation`.
    `info["success"]` says whether the red cube lies on the tray after the step.
    """

    def __init__(self, **kwargs):
        super().__init__(
            gripper_extra_height=0.2,
            block_gripper=False,
            has_object=True,
            target_in_the_air=False,
            target_offset=0.0,
            obj_range=0.0,
            target_range=0.0,
            distance_threshold=0.05,
            reward_type="sparse",
            n_substeps=20,
            initial_qpos={"robot0:slide0": 0.405, "robot0:slide1": 0.48, "robot0:slide2": 0.0},
            model_path=str(FETCH_XML),
            **kwargs,
        )

    def _initialize_simulation(self):
        # The base class loads an XML file; ours is that file edited in memory, so that no copy of it is kept here.
        scene, box = mujoco.MjSpec.from_file(self.fullpath), mujoco.mjtGeom.mjGEOM_BOX
        red = scene.geom("object0")
        red.material, red.rgba = "", [0.9, 0.1, 0.1, 1]
        blue = scene.worldbody.add_body(name="distractor", pos=[1.3, 0.6, 0.425])
        blue.add_freejoint(name="distractor:joint")
        blue.add_geom(name="distractor", type=box, size=[CUBE] * 3, mass=2, rgba=[0.1, 0.2, 0.9, 1])
        scene.worldbody.add_geom(name="tray", type=box, size=TRAY_HALF, pos=TRAY, rgba=[0.1, 0.7, 0.2, 1])
        scene.site("object0").rgba = scene.site("target0").rgba = [0, 0, 0, 0]  # markers of the original task
        for marker in scene.body("robot0:mocap").geoms:
            marker.rgba = [0, 0, 0, 0]
        self.model = scene.compile()
        self.data = mujoco.MjData(self.model)
        self._model_names = self._utils.MujocoModelNames(self.model)
        self.model.vis.global_.offwidth, self.model.vis.global_.offheight = self.width, self.height
        self._env_setup(initial_qpos=self.initial_qpos)
        self.initial_time = self.data.time
        self.initial_qpos, self.initial_qvel = self.data.qpos.copy(), self.data.qvel.copy()

    def _reset_sim(self):
        # Called by the base class's reset(seed) once the random generator is seeded.
        mujoco.mj_resetData(self.model, self.data)
        self.data.time = self.initial_time
        self.data.qpos[:], self.data.qvel[:] = self.initial_qpos, self.initial_qvel
        red_xy = blue_xy = None
        while red_xy is None or np.linalg.norm(red_xy - blue_xy) < 4 * CUBE:  # room for a finger between the cubes
            red_xy, blue_xy = self.np_random.uniform(CUBES_LOW, CUBES_HIGH, size=(2, 2))
        for joint, xy in (("object0:joint", red_xy), ("distractor:joint", blue_xy)):
            self._utils.set_joint_qpos(self.model, self.data, joint, [*xy, 0.4 + CUBE, 1, 0, 0, 0])
        mujoco.mj_forward(self.model, self.data)
        return True

    def _sample_goal(self):
        return np.array([TRAY[0], TRAY[1], TRAY[2] + TRAY_HALF[2] + CUBE])

    def _is_success(self, achieved_goal, desired_goal):
        # On the tray, not above it: a cube lying flat has its centre half an edge above the tray's top.
        offset = np.abs(achieved_goal - desired_goal)
        return bool(np.all(offset[:2] <= TRAY_HALF[:2]) and offset[2] <= 0.01)

    def compute_reward(self, achieved_goal, desired_goal, info):
        return float(info["is_success"])

    def compute_terminated(self, achieved_goal, desired_goal, info):
        info["success"] = info["is_success"]
        return bool(info["is_success"])


class StateObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Observations [11] at unit scale: gripper, red cube, gripper to cube (3 each), the two fingers' openings."""

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (11,), np.float64)

    def observation(self, observation):
        gripper, cube, to_cube, fingers = np.split(observation["observation"][:11], [3, 6, 9])
        return np.concatenate(
            [(gripper - WORKSPACE) / REACH, (cube - WORKSPACE) / REACH, to_cube / REACH, fingers / CUBE - 1]
        )


def make_state_env(**kwargs) -> gym.Env:
    """The state-based environment; its specification is stored in the dataset and recovers it from there."""
    return StateObservation(PickPlaceScene(**kwargs))


class CameraObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Observations [64, 64, 3] uint8: what a camera close to the table sees. Needs OpenGL, but no screen."""

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = gym.spaces.Box(0, 255, (PIXELS, PIXELS, 3), np.uint8)
        scene = env.unwrapped
        scene.model.vis.quality.shadowsize = 0  # a map of 64 MB that nothing needs
        scene.model.vis.quality.offsamples = 0  # without multisampling, and without ...
        self.renderer = MujocoRenderer(scene.model, scene.data, CAMERA, PIXELS, PIXELS, camera_id=-1)
        self.renderer.render("rgb_array")  # makes the drawing context
        atexit.register(self.renderer.close)  # at the latest before OpenGL itself ends
        for effect in ("SHADOW", "REFLECTION", "SKYBOX"):  # ... these a frame takes a third of the time
            self.renderer.viewer.scn.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{effect}")] = 0

    def observation(self, observation):
        self.renderer.viewer.make_context_current()  # several cameras in one process each have a context of their own
        return self.renderer.render("rgb_array").copy()

    def close(self):
        atexit.unregister(self.renderer.close)
        # Freed in its own context: later, it would delete the objects of the same numbers in another camera's.
        self.renderer.viewer.make_context_current()
        self.renderer.viewer.con.free()
        self.renderer.close()
        super().close()


def make_camera_env(**kwargs) -> gym.Env:
    """The environment as the camera sees it; recovered from the dataset like the state-based one."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    if os.environ.get("MUJOCO_GL") == "egl":
        importlib.import_module("mujoco.egl")  # fails here where the library is missing, not amid a viewer's making
    return CameraObservation(PickPlaceScene(**kwargs))


for env_id, make in (("cal-ql/PickPlace-v0", make_state_env), ("cal-ql/PickPlaceCamera-v0", make_camera_env)):
    if env_id not in gym.registry:  # `python -m` runs this file, and the entry point imports it a second time
        gym.register(env_id, entry_point=f"collect.pick_place:{make.__name__}", max_episode_steps=40)
STATE_SPEC, CAMERA_SPEC = gym.spec("cal-ql/PickPlace-v0"), gym.spec("cal-ql/PickPlaceCamera-v0")


class Demonstrator:
    """Picks the red cube and puts it on the tray from the true state, with Gaussian noise on every action.

    Args:
        noise: standard deviation of the noise; the actions are clipped to [-1, 1] afterwards.
        rng: the noise's source.
    """

    def __init__(self, noise: float, rng: np.random.Generator):
        self.noise, self.rng, self.grasped = noise, rng, False

    def __call__(self, scene: PickPlaceScene) -> np.ndarray:
        """Returns the action [4] (three displacements, and the gripper: positive opens) for the scene as it is."""
        state = scene._get_obs()["observation"]
        gripper, cube, to_cube = state[:3], state[3:6], state[6:9]
        above, hover = np.linalg.norm(to_cube[:2]) < 0.012, np.array([0, 0, 0.08])
        target, grip = cube + hover, 1.0
        if self.grasped and np.linalg.norm(to_cube) > 0.04:
            self.grasped = False  # dropped: start over
        if self.grasped:
            goal, grip = scene.goal, -1.0
            over_tray = np.linalg.norm((cube - goal)[:2]) < 0.04
            target = gripper + goal - cube + (0 if over_tray else hover)
        elif above or (np.linalg.norm(to_cube[:2]) < 0.02 and abs(to_cube[2]) < 0.03):
            target = cube
            if abs(to_cube[2]) < 0.015:
                grip, self.grasped = -1.0, state[9:11].sum() < 2.2 * CUBE
        action = np.append((target - gripper) / 0.04, grip)
        return np.clip(action + self.noise * self.rng.standard_normal(4), -1, 1).astype(np.float32)


@dataclasses.dataclass
class Args:
    """Collect noisy scripted demonstrations of pick-and-place as a Minari dataset."""

    camera: bool = False
    """observe images in place of the state"""
    dataset_id: str | None = None
    """the Minari id to write; None is cal-ql/pick-place/narrow-v0, with the camera cal-ql/pick-place/pixels-v0"""
    episodes: int | None = None
    """how many demonstrations; None is 10, with the camera 500"""
    noise: float = 0.4
    """standard deviation of the noise on the demonstrator's actions; at 0.4 more than half of them succeed"""
    seed: int = 1
    """seed of the scenes and of the noise"""
    overwrite: bool = False
    """collect anew and replace the dataset where one of that id exists"""

    def __post_init__(self):
        self.dataset_id = self.dataset_id or f"cal-ql/pick-place/{'pixels' if self.camera else 'narrow'}-v0"
        self.episodes = (500 if self.camera else 10) if self.episodes is None else self.episodes

    @property
    def algorithm(self) -> str:
        """What the dataset says of how it was collected."""
        return f"scripted, action noise {self.noise}"

    @property
    def parts(self) -> pathlib.Path:
        """The hidden folder, beside the dataset's, that keeps the demonstrations until all are there."""
        path = get_dataset_path(self.dataset_id)
        view = "camera" if self.camera else "state"
        return path.with_name(f".{path.name}-{view}-seed{self.seed}-noise{self.noise}")


def demonstrate(env: gym.Env, noise: float, seed: int) -> dict[str, np.ndarray]:
    """One demonstration of T <= 40 steps: observations [T+1, ...], actions [T, 4], success [T+1], as Minari has it."""
    observations, actions, success, over = [env.reset(seed=seed)[0]], [], [False], False
    demonstrator = Demonstrator(noise, np.random.default_rng(seed))
    while not over:
        actions.append(demonstrator(env.unwrapped))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation), success.append(info["success"])
        over = terminated or truncated
    return {"observations": np.array(observations), "actions": np.array(actions), "success": np.array(success)}


def collect(args: Args) -> minari.MinariDataset:
    """Rolls out the demonstrator and writes the dataset.

    Every demonstration is kept until all are written: collecting that was stopped goes on with the first one missing.
    Raises RuntimeError where the camera cannot draw.
    """
    spec, parts = CAMERA_SPEC if args.camera else STATE_SPEC, args.parts
    try:
        env = gym.make(spec)
    except Exception as error:  # OpenGL fails in many ways
        raise RuntimeError(
            f"cannot draw ({error}): on Debian and Ubuntu `apt-get install libegl1 libegl-mesa0 "
            "libgl1-mesa-dri`, and leave MUJOCO_GL unset or egl"
        ) from error
    parts.mkdir(parents=True, exist_ok=True)
    for k in tqdm(range(args.episodes), desc="demonstrations", unit="episode", disable=None):
        if not (parts / f"{k}.npz").exists():
            np.savez(parts / "unfinished.npz", **demonstrate(env, args.noise, 100_000 * args.seed + k))
            os.replace(parts / "unfinished.npz", parts / f"{k}.npz")
    env.close()

    def episodes():
        for k in range(args.episodes):
            part = dict(np.load(parts / f"{k}.npz"))
            succeeded = part["success"][1:]
            last = np.arange(len(succeeded)) == len(succeeded) - 1
            yield EpisodeBuffer(
                id=k,
                seed=100_000 * args.seed + k,
                observations=part["observations"],
                actions=part["actions"],
                rewards=succeeded.astype(np.float64),
                terminations=succeeded,
                truncations=last & ~succeeded,
                infos={"success": part["success"]},
            )

    shutil.rmtree(get_dataset_path(args.dataset_id), ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w+` is set to None")  # Minari asks for more than there is
        dataset = minari.create_dataset_from_buffers(
            args.dataset_id,
            episodes(),
            env=spec,
            algorithm_name=args.algorithm,
            author="Cal-QL",
            description="Scripted pick-and-place demonstrations, successful and failed.",
            jpeg_encoding=False,
        )
    shutil.rmtree(parts)
    return dataset


def main() -> int:
    args = tyro.cli(Args)
    if args.episodes < 1 or args.seed < 0 or not 0 <= args.noise < float("inf"):
        print("error: --episodes must be at least 1, --seed and --noise at least 0.", file=sys.stderr)
        return 2
    if not re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", args.dataset_id):  # the folder of that name will be replaced
        print(f"error: --dataset-id {args.dataset_id} must be like cal-ql/pick-place/name-v0.", file=sys.stderr)
        return 2
    if (get_dataset_path(args.dataset_id) / "data").exists() and not args.overwrite and not args.parts.exists():
        storage = minari.load_dataset(args.dataset_id).storage
        (first,) = storage.get_episode_metadata([0])
        made = storage.total_episodes, storage.metadata["algorithm_name"], first["seed"]
        if made != (args.episodes, args.algorithm, 100_000 * args.seed):
            print(f"error: {args.dataset_id} exists already, made with other settings ({made[0]} episodes, {made[1]}, "
                  f"seed {made[2] // 100_000}); --overwrite collects it anew.", file=sys.stderr)  # fmt: skip
            return 2
        print(f"{args.dataset_id} exists already; --overwrite collects it anew.")
        return 0
    # The environment's entry point is `collect.pick_place`, wherever and however this file is started.
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    try:
        dataset = collect(args)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    succeeded = sum(bool(episode.infos["success"].any()) for episode in dataset)
    print(f"{dataset.id}: {len(dataset)} episodes, {dataset.total_steps} steps, {succeeded} successful")
    return 0


if __name__ == "__main__":
    sys.exit(main())
